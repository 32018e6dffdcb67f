"""A server of Google Cloud Storage's protocol: gcp-storage-emulator, and what it lacks.

python gcs_server.py PORT

It takes an empty object for a missing body and ends the connection, lets a client that
asks whether to send its body wait for a second, and knows neither generations of what
is read, nor conditions of writes, nor ranges of listings
(https://cloud.google.com/storage/docs/json_api/v1/objects).
"""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

insert, delete, download, ls = (
    objects.insert,
    objects.delete,
    objects.download,
    objects.ls,
)


def option(request, name, default=None):
    return request.query.get(name, [default])[0]


def generation_of(request, storage, name):
    try:
        found = storage.get_file_obj(request.params["bucket_name"], name)
    except NotFound:
        return "0"
    return found["generation"]


def conditional(change, name_of):
    def handle(request, response, storage, *args, **kwargs):
        wanted = option(request, "ifGenerationMatch")
        there = generation_of(request, storage, name_of(request))
        if wanted not in (None, there):
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            change(request, response, storage, *args, **kwargs)

    return handle


def download_with_generation(request, response, storage, *args, **kwargs):
    there = generation_of(request, storage, request.params["object_id"])
    response["x-goog-generation"] = there
    download(request, response, storage, *args, **kwargs)


def ls_in_range(request, response, storage, *args, **kwargs):
    low, high = option(request, "startOffset", ""), option(request, "endOffset", "")
    answer = response.json

    def within(found):
        items = found.get("items") or []
        found["items"] = [
            item
            for item in items
            if item["name"] >= low and (not high or item["name"] < high)
        ]
        answer(found)

    response.json = within
    ls(request, response, storage, *args, **kwargs)


objects.insert = conditional(insert, lambda request: option(request, "name"))
objects.delete = conditional(delete, lambda request: request.params["object_id"])
objects.download = download_with_generation
objects.ls = ls_in_range

from gcp_storage_emulator import server, storage  # noqa: E402  # which take these up

read = server._read_data


def read_empty_too(handler, query):
    if "Expect" in handler.headers:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    found = read(handler, query)
    return b"" if found is None and query.get("uploadType") == ["media"] else found


if __name__ == "__main__":
    server._read_data = read_empty_too
    server.server.HTTPServer.request_queue_size = 128  # more than 5 clients at once
    # It writes of all objects at each change, for another server to read:
    storage.Storage._write_config_to_file = lambda self: None
    running = server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True)
    running.start()
    threading.Event().wait()
