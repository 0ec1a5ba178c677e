"""``python -m tp_plugin.finetune RECIPE.yaml``: see :mod:`tp_plugin.launch.finetune`."""

from tp_plugin.launch.finetune import main

if __name__ == "__main__":
    main()
