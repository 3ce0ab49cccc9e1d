#!/bin/sh
# The edge agent on a Jetson: sudo sh install.sh DEB [--gpu WHEEL]
#
#   JetPack 7 (Ubuntu 24.04, Python 3.12)   make deb TARGET_PYTHON=3.12
#   JetPack 6 (Ubuntu 22.04, Python 3.10)   make deb TARGET_PYTHON=3.11; Python 3.11 is installed
#                                           from the deadsnakes archive, beside the system's own
#
# The package brings ONNX Runtime for the CPU. --gpu takes a wheel of onnxruntime-gpu that NVIDIA
# built for this JetPack and this Python, and lays it before the package's: where it offers CUDA,
# the agent trains there. See docs/fleet.md.
set -eu

fail() {
    echo "install: $1" >&2
    exit 2
}

deb=${1:-}
[ -f "$deb" ] || fail "which package? sudo sh install.sh stillhouse-edge-agent_..._arm64.deb"
shift
wheel=
if [ "${1:-}" = --gpu ]; then
    wheel=${2:-}
    [ -f "$wheel" ] || fail "--gpu wants the file of a wheel, onnxruntime_gpu-...-linux_aarch64.whl"
fi

[ "$(id -u)" = 0 ] || fail "run it as root: sudo sh install.sh $deb"
[ "$(dpkg --print-architecture)" = arm64 ] || fail "this machine is no arm64"
[ "$(dpkg-deb --field "$deb" Architecture)" = arm64 ] || fail "$deb is not for arm64: make deb"
[ -f /etc/nv_tegra_release ] || echo "install: no /etc/nv_tegra_release; is this a Jetson?" >&2

# The package names the one Python it is for.
python=$(dpkg-deb --field "$deb" Depends | grep -o 'python3\.[0-9]*' | head -n 1)
tag=cp$(echo "${python#python}" | tr -d .)
if [ -n "$wheel" ]; then
    case $(basename "$wheel") in
        onnxruntime_gpu-*"-$tag-"*aarch64.whl) ;;
        *) fail "$(basename "$wheel"): expected onnxruntime_gpu-...-$tag-...aarch64.whl" ;;
    esac
fi

if ! apt-cache show "$python" >/dev/null 2>&1; then
    . /etc/os-release
    [ "${ID:-}" = ubuntu ] || fail "$python is not to be had on ${PRETTY_NAME:-this system}"
    apt-get install --yes software-properties-common
    add-apt-repository --yes ppa:deadsnakes/ppa
    apt-get update
fi
apt-get install --yes "$python" "$(readlink -f "$deb")"

local=/opt/stillhouse/local
rm -rf "$local"
if [ -n "$wheel" ]; then
    site=/opt/stillhouse/lib/$python/site-packages
    mkdir -p "$local"
    # A wheel is a zip file; this one alone, since all that it needs is in the package.
    "$python" -m zipfile -e "$wheel" "$local"
    echo "import sys; sys.path.insert(1, '$local')" > "$site/local.pth"
    /opt/stillhouse/bin/python3 -I -c '
import onnxruntime as ort
offered = ort.get_available_providers()
print("onnxruntime", ort.__version__, ", ".join(offered))
raise SystemExit("CUDAExecutionProvider" not in offered)
' || {
        rm -rf "$local" "$site/local.pth"
        fail "this wheel offers no CUDA here, and was taken out again; the CPU does the work"
    }
fi
echo "installed; next: the settings of orchestrator enroll to /etc/stillhouse/agent.toml"
