"""A trained model on images: search by words, and classes of your own."""
