"""Says every path that Python's watchdog hears of; arguments are the directories."""

import sys
import time

from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer


class Handler(FileSystemEventHandler):
    def on_any_event(self, event):
        # Whoever reads opens and closes: no news.
        if event.event_type in ("opened", "closed_no_write"):
            return
        # A directory is said to be modified when something in it is, also a file's attributes.
        if event.is_directory and event.event_type == "modified":
            return
        print(event.src_path, flush=True)
        if event.event_type == "moved":
            print(event.dest_path, flush=True)


observer = Observer()
for directory in sys.argv[1:]:
    observer.schedule(Handler(), directory, recursive=True)
observer.start()
print("ready", flush=True)
while observer.is_alive():
    time.sleep(1)
