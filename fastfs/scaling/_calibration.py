from dataclasses import dataclass
from typing import Any
from fastfs.scaling._roles import split, is_other
@dataclass
class Calibration:
    best: Any; largest: float; relative: float; trials: Any; optimizers: Any; apart: Any
    def groups(self, of=None):
        o = of or self.optimizers[0]
        r = split(o, self.apart)
        for g in r: g["lr"] *= self.best.rate*(self.best.factor if is_other(g,self.apart) else 1)
        return r
