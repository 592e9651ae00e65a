"""A trained model in the forms of other programs, checked as it is written.

check.py        inputs that an export is tried on, and the largest difference between features
folder.py       the folder of an export: written beside its place, and moved there once it is checked
onnx.py         image and text tower as ONNX files
clip_model.py   a folder of transformers' CLIPModel, with tokenizer and image processor
model_card.py   the card of a run: data, objective, settings, results, licence, limits
hub.py          a folder that open_clip opens as hf-hub:ORG/NAME, and its upload
"""
