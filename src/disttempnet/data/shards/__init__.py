"""Webdataset shards: from a spec to an index of samples.

names.py         spec → files
patterns.py      braces and wildcards
credentials.py   of URLs
store.py         opens local shards
remote.py        opens remote ones through a cache
tar.py           members of a tar as byte ranges, and their keys
scan.py          samples of one shard, with status and statistics
journal.py       scanned shards on disk while an index is built
build.py         builds an index in parallel, and updates one
index.py         the index: dense ids → byte ranges
open.py          opens the index, and checks it against the shards
"""
