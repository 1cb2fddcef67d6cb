"""JupyterLab as `make lab` starts it: a notebook is cleaned when it is saved, so that running it leaves no noise in git."""

from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821  (`c` is Jupyter's)
