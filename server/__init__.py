"""What a coordinator runs: the round loop, strategies and checkpoints, members and releases.

```python
from pathlib import Path

from fedlora.server.coordinator.folder import Directory
from fedlora.server.release.verify import verify_export

directory = Directory.create(Path("coordinator"), "wards", host="fl.example.org")
member = directory.registry.enrol(Path("enrolment.json").read_text(), "enrolment.json")
print(member.name, member.identity.fingerprint)  # compared by telephone

# a release is checked offline, by anybody, without a model
for line in verify_export("export", key="coordinator.pub"):
    print(line)
```
"""
