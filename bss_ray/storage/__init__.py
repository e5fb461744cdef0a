"""Files of a run on any `storage_path`: a disk, a shared file system, or an object store.

A place is named as Ray Train names it: a path, or a URI that `pyarrow.fs.FileSystem.from_uri` takes, such as
`s3://bucket/runs`, `s3://bucket/runs?endpoint_override=host:9000&scheme=http`, `gs://bucket/runs`,
`abfs://container@account.dfs.core.windows.net/runs`, or `fsspec+NAME://...` for file systems of fsspec.
"""

from bss_ray.storage.files import absolute as absolute
from bss_ray.storage.files import hidden as hidden
from bss_ray.storage.files import is_uri as is_uri
from bss_ray.storage.path import StoragePath as StoragePath
