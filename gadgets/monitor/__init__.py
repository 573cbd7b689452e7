"""What an administrator sees of a running server: health, metrics and a read-only web page.

The server's side (``observer.py``) writes small files; the monitor is a process of its own that reads them, so that nothing which
happens to it can touch a scan.
"""
