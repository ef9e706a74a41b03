"""Other meta-learning libraries' names, call shapes and semantics on current PyTorch: change the import.

    from fastmeta.compat import learn2learn as l2l

A folder for each library, with that library's own module names. Nothing of fastmeta imports them.
"""
