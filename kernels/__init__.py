"""handloom.kernels: one operation a file, each with its torch reference and its Triton kernel."""

# The distribution `kernels`, which transformers and bitsandbytes import, has this folder's name. Where the
# repository root is on `sys.path` (`python -m pytest`, a notebook beside this folder), `import kernels` would
# find us in its place, so we hand over to the real one; where there is none we stay an empty module, which
# transformers takes for "not installed".
if __name__ == "kernels":
    import os
    import sys
    from importlib import util
    from importlib.machinery import PathFinder

    here = os.path.realpath(os.path.dirname(__file__))
    elsewhere = [entry for entry in sys.path if os.path.realpath(os.path.join(entry, "kernels")) != here]
    __path__ = []  # no second copy of our modules as `kernels.*`
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec is not None and spec.loader is not None:
        sys.modules["kernels"] = util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])
    else:

        def __getattr__(name):
            """Nothing can be imported from here, for the reason that there is where nothing is installed."""
            if name.startswith("__"):
                raise AttributeError(name)
            raise ModuleNotFoundError("No module named 'kernels'", name="kernels")
