"""What institutions, coordinators and researchers share: values, accounting, ledger, model.

```python
from fedlora.common.privacy.accountant import Mechanism, epsilon_of
from fedlora.common.privacy.calibration import calibrate

# forty steps, each of which draws every record with probability 0.1
noise = calibrate([], sampling_rate=0.1, steps=40, epsilon=3.0, delta=1e-5)
half = epsilon_of([Mechanism(0.1, noise, 20)], delta=1e-5)
print(f"σ = {noise:.3f} keeps them within ε = 3; half of them cost {half:.3f}")
```
"""
