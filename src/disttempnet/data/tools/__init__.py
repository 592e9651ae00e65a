"""What the commands of `disttempnet data` do.

write.py        any source → webdataset shards
verify.py       reads everything, names what is broken
download.py     CC3M and CC12M from their public lists of URLs
preview.py      random samples with captions;  sheet.py: on one picture
unreadable.py   samples that cannot be used: named, counted by reason
summary.py      an index in tables
"""
