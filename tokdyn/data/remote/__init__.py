"""Read files of object storage and web servers in parts, through a cache on the local disk."""
