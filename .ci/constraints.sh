#!/usr/bin/env bash
# Write the versions that are installed in .venv to constraints.txt: run it after the tests passed with newer versions.
set -euo pipefail
cd "$(dirname "$0")/.."
{
  echo "# Tested versions (Python 3.11, Linux). 'pip install -c constraints.txt .' reproduces the tested environment."
  echo "# torch and torchvision are a matching pair; what torch itself pins (CUDA libraries, triton) is left to torch."
  .venv/bin/python -m pip freeze --exclude-editable \
    | grep -E '^[A-Za-z0-9_.-]+==' | grep -viE '^(nvidia|cuda|triton|pip|setuptools|wheel|micro[_-]sam)' | sed 's/+.*$//'
} > constraints.txt
