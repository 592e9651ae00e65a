"""Features of locked towers, computed once and read ever after.

store.py       shards of features on disk: written atomically, verified, memory-mapped
build.py       samples → shards, over ranks, processes and loader workers; resumable
batches.py     a run's batches, with features in place of what a locked tower would take
reference.py   embeddings of a reference model (drrho)
export.py      features of a data set as files for your own use
cache_key.py   the key of a cache: what its features depend on
"""
