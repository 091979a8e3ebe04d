"""Training text from many sources: `moai data build`. recipe.py says what may be asked for, build.py what is done.

sources.py reads, text.py cleans and filters, near.py finds what is alike, ledger.py holds the units meanwhile,
kernels.py is the machine code, report.py what a mix says about itself."""

from moai_core.data.mix.build import build
from moai_core.data.mix.recipe import Mix, MixSource, check, find, load

__all__ = ["Mix", "MixSource", "build", "check", "find", "load"]
