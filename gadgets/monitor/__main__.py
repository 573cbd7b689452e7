"""``python -m gadgets.monitor``: the monitor as a process, as the server starts it."""

from gadgets.monitor.command import main

if __name__ == "__main__":
    main()
