"""Icons by many artists with their names: 258,075 real pairs with a natural long tail, built from one npm package.

release.py   what the set is made from and what has to come out
package.py   the npm package: downloaded, checked, unpacked
draw.py      an icon → its concept, its style and its picture
splits.py    which icons are trained on, and their captions
write.py     rows → Parquet, and the licences beside them
build.py     all of it, in parallel and resumable: `disttempnet data icons`
built.py     where a built set lies
"""
