"""``python -m tp_plugin.run script.py args...``: see :mod:`tp_plugin.launch.run`."""

from tp_plugin.launch.run import main

if __name__ == "__main__":
    main()
