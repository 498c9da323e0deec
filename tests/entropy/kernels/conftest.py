"""Every array signature of the kernels is checked at run time."""

from jaxtyping import install_import_hook

install_import_hook(["isentropic.entropy.kernels"], "beartype.beartype")
