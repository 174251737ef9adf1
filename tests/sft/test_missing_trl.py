"""Without trl, its trainer says what to install; everything else works."""

import os
import subprocess
import sys


def test_missing_trl_says_what_to_install():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "from hf_tokenseek import SeekCallback, TokenSeekTrainer\n"
        "for name in ('TokenSeekSFTTrainer', 'TokenSeekSFTConfig'):\n"
        "    try:\n"
        "        __import__('hf_tokenseek', fromlist=[name]).__getattr__(name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        print(error.name, error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trl TokenSeekSFTTrainer needs the package `trl`") == 2
    assert "pip install 'hf_tokenseek[trl]'" in done.stdout
