"""A folder of the bucket that bucket_server.py keeps, as tests see it: put, get, list, and faults."""

import json
import time
import urllib.request
from pathlib import Path


class Control:
    """Google's storage control service, as far as gcsfs asks it for the kind of a bucket: here, one without folders."""

    async def get_storage_layout(self, **_):
        from google.cloud.storage_control_v2 import StorageLayout

        return StorageLayout(location_type="region")


def answer_of_control() -> None:
    """Lets gcsfs ask `Control` in this process, since bucket_server.py does not speak gRPC."""
    from gcsfs.extended_gcsfs import ExtendedGcsFileSystem

    async def client(self) -> Control:
        return Control()

    ExtendedGcsFileSystem._get_control_plane_client = client


def environment(service: str, cache: Path) -> dict[str, str]:
    """Returns the variables with which gcsfs and tensorstore ask the service at this address."""
    folder = {"XDG_CACHE_HOME": str(cache / "cache")}
    return {"STORAGE_EMULATOR_HOST": service, "TENSORSTORE_GCS_HTTP_URL": service, **folder}


def s3_environment(service: str, cache: Path) -> dict[str, str]:
    """Returns the variables with which s3fs asks the service at this address."""
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "none")
    return {"AWS_ENDPOINT_URL": service, **keys, "XDG_CACHE_HOME": str(cache / "cache")}


class Bucket:
    def __init__(self, service: str, name: str, scheme: str = "gs"):
        self.service, self.scheme, self.address = service, scheme, f"{scheme}://bucket/{name}"

    def __truediv__(self, name: str) -> str:
        """Returns the address of a file or folder."""
        return f"{self.address}/{name}"

    @property
    def _files(self):
        import fsspec

        return fsspec.filesystem(self.scheme, use_listings_cache=False)

    def put(self, folder: Path) -> None:
        """Puts the files of a local folder into this one."""
        for file in folder.rglob("*"):
            if file.is_file():
                self._files.pipe_file(self / file.relative_to(folder).as_posix(), file.read_bytes())

    def write(self, name: str, content: str | bytes) -> None:
        self._files.pipe_file(self / name, content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        self._files.rm_file(self / name)

    def read(self, name: str) -> str:
        return self._files.cat_file(self / name).decode()

    def names(self) -> list[str]:
        """Returns the names of all objects, in order."""
        root = self.address.partition("://")[2] + "/"
        return sorted(name.removeprefix(root) for name in self._files.find(self.address))

    def fault(self, **fault) -> None:
        """Sets the fault of the requests to gs:// that follow, see bucket_server.py; none without arguments."""
        data = json.dumps(fault).encode()
        urllib.request.urlopen(urllib.request.Request(f"{self.service}/faults", data, method="PUT")).close()

    def met(self) -> dict[str, int]:
        """Returns how many requests have had the fault that was set last, see bucket_server.py."""
        with urllib.request.urlopen(f"{self.service}/faults") as answer:
            return json.load(answer)

    def wait_for(self, what: str) -> None:
        """Returns when a request with the fault that was set last has "begun" or "ended"."""
        until = time.monotonic() + 60
        while not self.met()[what]:
            assert time.monotonic() < until, f"no request has {what}"
            time.sleep(0.02)
