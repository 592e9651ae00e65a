"""Built-in data sets: no download, made into shards on first use.

emoji.py    renderings and names of emoji, packed in the package
scenes.py   synthetic pictures of shapes with a known long tail
cache.py    the folder of this user where they are kept
"""
