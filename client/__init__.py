"""What runs at an institution: the only code that touches private text.

```python
from pathlib import Path

from fedlora.client.consent.judge import judge
from fedlora.client.node.enrolment import init
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import load_policy
from fedlora.common.manifest.manifest import RunManifest

node = NodeFolder(Path("node"))
print(init(node, "ward-7", "The hospital").identity.fingerprint)  # to be read out by telephone

# would its policy let this run in? every field, and what speaks against it
manifest = RunManifest.from_bytes(Path("manifest.json").read_bytes())
for verdict in judge(manifest, load_policy(node.policy), "bank-intents", spent={}):
    print(verdict.field, verdict.found, verdict.reason or "allowed")
```
"""
