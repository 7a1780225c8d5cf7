import sys,time,json,statistics
import numpy as np
import edgelm.weights as w
if sys.argv[2]=="ours": w.WORTH_BYTES=0
from edgelm.boardcache import BoardCache
from edgelm.weights import open_verified
from edgelm.session import open_session
from pathlib import Path
import edgelm
p=Path(edgelm.__file__).parent/"builtin" if sys.argv[1]=="builtin" else Path(sys.argv[1])
c=BoardCache.default()
t=time.perf_counter(); s=open_session(open_verified(p,c),rows=1,threads=2,cache=c); load=time.perf_counter()-t
r=np.random.default_rng(0).integers(3,200,100); s.prefill(0,r,0)
t=[]
for i in range(200):
    a=time.perf_counter(); s.decode(np.full(1,5),np.full(1,100,np.int32)); t.append(time.perf_counter()-a)
a=time.perf_counter(); s.prefill(0,r,0); pre=time.perf_counter()-a
print(sys.argv[2],round(load*1e3,1),"prefill100",round(pre*1e3,2),"step us",round(statistics.median(t)*1e6))
