#!/bin/sh
# Everything that a GPU has to show (docs/results.md), as one file: sh simulations/benchmarks/gpu.sh OUT.json
# From the repository's root, on a machine with one GPU and a python3 that has torch, transformers, peft, opacus
# and what the core needs; this project need not be installed, and nothing is fetched. Under 8 minutes: what took
# too long is left out, and the file says so. Without a GPU it tries itself on a tiny shape.
set -u
out=${1:-gpu.json}
parts=$(mktemp -d)
export PYTHONPATH="$PWD/.typing${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
python3 -c 'import torch, transformers, peft, opacus, tokenizers, safetensors, tomli_w, cryptography' || exit 2

measure() { # name, seconds, arguments
    name=$1 limit=$2
    shift 2
    timeout "$limit" python3 simulations/benchmarks/large_step.py "$@" --json "$parts/$name.json" >"$parts/$name.log" 2>&1 ||
        { echo "$name: exit $?"; tail -n 3 "$parts/$name.log"; }
}

if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    measure llama-1b 150 llama-1b --records 64
    measure minilm 90 minilm --records 8192
    measure llama-8b-nf4 100 llama-8b --records 2 --repeats 1 --ways packed --dtype nf4 --checkpointing
    measure llama-8b-bf16 80 llama-8b --records 2 --repeats 1 --ways packed --checkpointing
    measure bert-base 60 bert-base --records 2048
else
    measure tiny 600 tiny --records 4 --repeats 1
fi

python3 - "$parts" "$out" <<'END'
import datetime, json, pathlib, subprocess, sys
parts, out = map(pathlib.Path, sys.argv[1:])
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
found = {each.stem: json.loads(each.read_text()) for each in sorted(parts.glob("*.json"))}
lost = {each.stem: each.read_text()[-2000:] for each in sorted(parts.glob("*.log")) if each.stem not in found}
table = {"commit": commit, "date": datetime.date.today().isoformat(), "measured": found, "not measured": lost}
out.write_text(json.dumps(table, indent=2) + "\n")
print(f"{out}: {', '.join(found) or 'nothing'} measured, {', '.join(lost) or 'nothing'} lost")
sys.exit(bool(lost))
END
