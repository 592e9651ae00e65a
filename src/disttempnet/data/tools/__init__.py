"""Tools behind the commands of `disttempnet data`.

write.py        any source → webdataset shards
verify.py       reads samples and shards, and lists broken ones
download.py     CC3M and CC12M from their public lists of URLs
hub_shards.py   CC3M and CC12M as shards of the Hugging Face Hub
preview.py      random samples with captions
sheet.py        drawn on one picture
unreadable.py   broken samples: table by reason, list in a file
summary.py      statistics of an index in tables
"""
