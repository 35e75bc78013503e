"""What runs at an institution: the only code that touches private text.

```python
from pathlib import Path

from fedlora.client.consent.judge import judge
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import load_policy
from fedlora.common.manifest.manifest import RunManifest

# would this node's policy let that run in? every field, and what speaks against it
policy = load_policy(NodeFolder(Path("node")).policy)
manifest = RunManifest.from_bytes(Path("manifest.json").read_bytes())
for verdict in judge(manifest, policy, "bank-intents", spent={}):
    print(verdict.field, verdict.found, verdict.reason or "allowed")
```
"""
