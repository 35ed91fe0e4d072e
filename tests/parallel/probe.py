import torch, json, tempfile, os, traceback
import torch.distributed as dist
import fastfs
from tests.helpers.parallel_cases import *
def probe(setups, optimizer="adamw", steps=5, **o):
    out=[]
    for s in setups:
        try:
            opts={"dtype":torch.float32} if s in("mixed",) else {}
            plain=Training(s,optimizer,**opts,**o)
            for i in range(steps): plain.step(i)
            w=Training(s,optimizer,**opts,**o)
            path=tempfile.mktemp(suffix=".jsonl")
            def go():
                with fastfs.Monitor(w.model,w.optimizer,every=2,aligned_every=1,path=path,verbose=False):
                    for i in range(steps): w.step(i)
            msgs=warned(go)
            rows=[json.loads(l) for l in open(path)]
            out.append((dist.get_rank(),s,"SAME" if same(plain.state(),w.state()) else "DIFFERENT", [m[:700] for m in msgs]))
            for r in rows[1:]:
                if r.get("kind") in("measured","predicted"):
                    out.append({k:(v if not isinstance(v,list) else [round(x,5) if isinstance(x,float) else x for x in v]) for k,v in {**r,**r.get("rows",{})}.items() if k in("kind","step","valid","reason","cosine","cos_angle","residual","decrease","aligned_decrease","decrease_reason","update_rms","relative_update")} or list(r))
                elif dist.get_rank()==0 and "cut" in r: out.append({k:r[k] for k in r if k in("cut","reason","layers","cut_reason","parameters")})
        except Exception:
            out.append((dist.get_rank(),s,traceback.format_exc()))
    return "\n".join(map(str,out)) if dist.get_rank()==0 else "\n".join(str(x) for x in out if isinstance(x,tuple))
