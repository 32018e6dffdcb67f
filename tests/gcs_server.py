"""A server of Google Cloud Storage's protocol: gcp-storage-emulator, less one fault.

python gcs_server.py PORT

It takes an empty object for a missing body, and ends the connection. (It knows neither
ranges in listings nor conditions of writes; who tests those has to ask another one.)
"""

import sys
import threading

from gcp_storage_emulator import server

read = server._read_data


def read_empty_too(handler, query):
    found = read(handler, query)
    return b"" if found is None and query.get("uploadType") == ["media"] else found


if __name__ == "__main__":
    server._read_data = read_empty_too
    running = server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True)
    running.start()
    threading.Event().wait()
