"""Starts the emulator of Google Cloud Storage from PyPI, with one header that it leaves out, and a longer queue.

    python -m tests.gcs_emulator PORT BUCKET

The API names the generation of an object with every download (`x-goog-generation`). The emulator does not, and
TensorStore then takes it for 0 and fails ("Malformed StorageGeneration") as soon as it replaces an object that it read
before. And of more than five clients that connect at once it turns some away, which then wait for seconds to minutes.

Nothing else is changed; in particular the emulator heeds no `ifGenerationMatch`.
"""

import http.server
import sys

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def _with_generation(download):
    def handler(request, response, storage, *args, **kwargs):
        try:
            name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*name)["generation"]
        except NotFound:
            pass  # the handler says so
        return download(request, response, storage, *args, **kwargs)

    return handler


def main(port, bucket):
    objects.download = _with_generation(objects.download)  # `objects.get` looks it up when it is called
    http.server.HTTPServer.request_queue_size = 256
    server.create_server("127.0.0.1", int(port), in_memory=True, default_bucket=bucket).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
