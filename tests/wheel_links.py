"""wheel_links.py WHEEL: that one build works with every torch, and on the Linuxes it is meant for.

Every symbol that fastrl._C wants from outside is Python's, or has a version of glibc, libstdc++ or
libgcc: then none is of PyTorch. And none is newer than manylinux allows.
"""

import json
import re
import subprocess
import sys
import zipfile
from io import BytesIO

from elftools.elf.elffile import ELFFile

SYSTEM = {f"lib{x}.so" for x in ("c", "m", "pthread", "dl", "rt", "gcc_s", "stdc++")}
SYSTEM |= {"ld-linux-x86-64.so", "ld-linux-aarch64.so"}


NEWEST = (2, 28)  # glibc, as docs/packaging.md promises


def module(path):
    with zipfile.ZipFile(path) as wheel:
        (name,) = (n for n in wheel.namelist() if n.startswith("fastrl/_C."))
        return ELFFile(BytesIO(wheel.read(name)))


def outside(elf):
    """The libraries asked for, and the symbols wanted that name no library's version."""
    dynamic = elf.get_section_by_name(".dynamic")
    libraries = [t.needed for t in dynamic.iter_tags() if t.entry.d_tag == "DT_NEEDED"]
    versions = elf.get_section_by_name(".gnu.version")
    free = [
        symbol.name
        for i, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
        if symbol["st_shndx"] == "SHN_UNDEF"
        and symbol["st_info"]["bind"] == "STB_GLOBAL"
        and versions.get_symbol(i)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
    ]
    return libraries, free


def main(path):
    libraries, free = outside(module(path))
    strange = [x for x in libraries if x.rpartition(".so")[0] + ".so" not in SYSTEM]
    assert not strange, f"the module links {strange}"
    strange = [x for x in free if not x.startswith(("Py", "_Py"))]
    assert free and not strange, f"the module wants {strange} from whoever has them"
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", "--json", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    linux = json.loads(done.stdout)
    glibc = re.match(r"manylinux_(\d+)_(\d+)_", linux["overall_tag"])
    assert glibc and (int(glibc[1]), int(glibc[2])) <= NEWEST, (
        f"{linux['overall_tag']}: csrc/portable.cpp or csrc/cuda/glibc.cpp lacks what is new among "
        f"{linux['versioned_symbols']}"
    )
    print(f"  ok: {linux['overall_tag']}; links {' '.join(libraries)}")


if __name__ == "__main__":
    main(sys.argv[1])
