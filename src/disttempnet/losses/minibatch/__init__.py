"""Objectives outside the family, one a file: siglip, cyclip, vicreg, onlineclr, amorlip."""
