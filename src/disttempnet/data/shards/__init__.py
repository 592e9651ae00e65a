"""Webdataset shards: which tars a spec names, what lies in one, the index of their samples.

names.py     which files a spec names; members of a tar as byte ranges
store.py     who opens a shard: where it lies, or through the cache of remote.py
scan.py      samples of one shard, which of them are usable, how large they are
journal.py   what is scanned so far, kept on disk while an index is made
build.py     makes the index in parallel, and brings one up to date
index.py     the index: dense ids → byte ranges
open.py      opens the index, and checks it against the shards
"""
