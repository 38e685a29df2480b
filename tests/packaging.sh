#!/usr/bin/env bash
# packaging.sh [WHEEL]: installs fastrl the ways users do, away from the source tree: sdist, wheel
# built from it, wheel without a compiler, editable; each beside a package named `kernels`, as
# Hugging Face's is. With WHEEL nothing is built: that one file is tried, with a part of the tests.
# Takes torch and the tools from the `python` on PATH and needs no network, unless asked to fetch
#   KERNELS=1           Hugging Face's own `kernels` (10 MB), for the wheel to lie beside
#   TORCHES="2.9.1 ..."  other torches, for the one wheel to pass a part of the tests with; from PyPI
#                       each brings 3 to 4 GB of CUDA packages, from PIP_INDEX_URL=https://
#                       download.pytorch.org/whl/cpu none
set -euo pipefail
wheel=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."

python=$(command -v python)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# A new environment that sees the packages of ours but not its editable fastrl: a path added by a
# .pth file is not searched for further .pth files.
environment() {
  "$python" -m venv --without-pip "$work/$1"
  local site
  site=$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$packages" >"$site/outer.pth"
  mkdir "$site/kernels"
  echo 'whose = "theirs"' >"$site/kernels/__init__.py"
}

# check ENVIRONMENT FOLDER IMPL: import, compute, run the command line, from FOLDER.
check() {
  (cd "$2" && "$work/$1/bin/python" - "$3" <<'PY'
import sys

import kernels
import torch

import fastrl
from fastrl.kernels import gae

assert getattr(kernels, "whose", "") == "theirs" or kernels.get_kernel, kernels
assert sys.prefix in fastrl.__file__ or "fastrl-" in fastrl.__file__, fastrl.__file__
ones = torch.ones(2, 3)
try:
    used = "cpu"
    advantages, _ = gae(ones, ones, lam=1.0, impl="cpu")
except ValueError as error:
    used = "reference"
    print(f"  {error}")
    advantages, _ = gae(ones, ones, lam=1.0, impl="reference")
assert advantages.tolist() == [[2.0, 1.0, 0.0]] * 2, advantages
assert used == sys.argv[1], f"{used} where {sys.argv[1]} was expected"
PY
    "$work/$1/bin/fastrl" --help >/dev/null)
  echo "  ok: $1, $3 from $2"
}

# trial ENVIRONMENT: the self-test of every op, and of the tests what asks most of torch, in a minute.
trial() {
  (cd "$work" && "$1/bin/fastrl" doctor --selftest >log) || { cat "$work/log"; exit 1; }
  [ -d "$work/tests" ] || cp -r tests pyproject.toml "$work"
  (cd "$work" && "$1/bin/python" -m pytest -q -m "not slow and not gpu" \
    -k "not every_instruction_set" \
    tests/test_{scan,sample,models}.py)
}

install() {
  "$python" -m pip --python "$work/$1/bin/python" install --no-deps --no-build-isolation \
    --disable-pip-version-check "${@:2}" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}

# With what it depends on; nothing outside the environment is touched.
fetch() {
  "$python" -m pip --python "$work/$1/bin/python" install -q --disable-pip-version-check "${@:2}"
}

if [ -z "$wheel" ]; then
  echo "== sdist"
  "$python" -m build --sdist --no-isolation --outdir "$work/dist" . >"$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }
  mkdir "$work/src"
  [[ $(echo "$work"/dist/*) != *+cu* ]] || { echo "the sdist names a CUDA"; exit 1; }
  tar -xf "$work"/dist/fastrl-*.tar.gz -C "$work/src"
  source=$(echo "$work"/src/fastrl-*)
  for file in CMakeLists.txt bench/race.py fastrl/py.typed; do
    [ -e "$source/$file" ] || { echo "the sdist lacks $file"; exit 1; }
  done
  for folder in csrc kernels; do
    diff -r -x __pycache__ "$folder" "$source/$folder" || { echo "the sdist's $folder differs"; exit 1; }
  done

  echo "== wheel without a compiler"
  mkdir "$work/empty"
  PATH="$work/empty" "$python" -m build --wheel --no-isolation --outdir "$work/plain" "$source" \
    >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
  grep -q "no C++ compiler found" "$work/log" || { echo "no warning about the compiler"; exit 1; }
  environment plain-env
  install plain-env "$work"/plain/*.whl
  # What it depends on needs no compiler either: of no package here was a wheel built on this
  # machine, whose tag has a plain "linux" where one from an index says which Linux it runs on.
  "$work/plain-env/bin/python" - <<'PY'
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

seen, todo = set(), ["fastrl"]
while todo:
    name = todo.pop()
    if name in seen:
        continue
    seen.add(name)
    try:
        package = distribution(name)
    except PackageNotFoundError:  # such as CUDA's beside a torch for CPUs
        continue
    built = [tag for tag in (package.read_text("WHEEL") or "").split() if "-linux_" in tag]
    assert name == "fastrl" or not built, f"{name} was compiled here ({built[0]})"
    needs = map(Requirement, package.requires or ())
    todo += [r.name for r in needs if r.marker is None or r.marker.evaluate({"extra": ""})]
PY
  check plain-env "$work" reference

  echo "== wheel from the sdist"
  # All source files, for as few instruction sets as take every path of what follows.
  export CMAKE_ARGS=-DFASTRL_X86_ISAS=avx2
  "$python" -m build --wheel --no-isolation --outdir "$work/wheel" "$source" >"$work/log" 2>&1 ||
    { cat "$work/log"; exit 1; }
  wheel=$(echo "$work"/wheel/*.whl)

  echo "== editable"
  environment editable-env
  FASTRL_CUDA=off install editable-env --verbose --editable "$source"
  ! grep "Editable installation" "$work/log" || { echo "setuptools warns"; exit 1; }
  check editable-env "$work" cpu
  check editable-env "$source" cpu
else
  TORCHES=${TORCHES:-$("$python" -c 'import torch; print(torch.__version__)')}
fi

echo "== $(basename "$wheel")"
"$python" - "$wheel" <<'PY'
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
(info,) = {n.partition("/")[0] for n in names if ".dist-info/" in n}
for start in (
    "fastrl/_C.",
    "fastrl/bench/race.py",
    "fastrl/kernels/scan/op.py",
    "fastrl/py.typed",
    "fastrl/recipes/",
    f"{info}/licenses/LICENSE",
    f"{info}/licenses/LICENSES/README.md",  # what is compiled in
    f"{info}/licenses/LICENSES/pybind11.txt",
):
    assert any(n.startswith(start) for n in names), f"the wheel lacks {start}"
strange = [n for n in names if n.partition("/")[0] not in ("fastrl", info)]
assert not strange, f"the wheel brings {strange}"  # such as libraries that auditwheel put in
PY
"$python" tests/wheel_links.py "$wheel"
environment wheel-env
install wheel-env "$wheel"
check wheel-env "$work" cpu
(cd "$work" && wheel-env/bin/fastrl bench scan --shape B=3,T=17 --seconds 0.1 --no-peak \
  --against eager >/dev/null)
FASTRL_NATIVE=off check wheel-env "$work" reference

if [ -n "${KERNELS:-}" ]; then
  echo "== beside Hugging Face's kernels"
  environment kernels-env
  rm -r "$work"/kernels-env/lib/python*/site-packages/kernels
  fetch kernels-env kernels
  install kernels-env "$wheel"
  check kernels-env "$work" cpu
fi

for version in ${TORCHES:-}; do
  name="torch-$version"
  echo "== torch $version"
  environment "$name"
  fetch "$name" "torch==$version"
  install "$name" "$wheel"
  "$work/$name/bin/python" -c "import torch; assert torch.__version__.startswith('$version')"
  check "$name" "$work" cpu
  trial "$name"
done
echo "packaging: ok"
