import sys, functools, traceback
sys.path.insert(0,'/tmp')
from tests.support.ranks import on_ranks
def run(tp, cases):
    from tests.support.train import compare
    out={}
    for c in cases:
        try: out[str(c)]=compare(tp=tp,**c)
        except Exception: out[str(c)]=traceback.format_exc()[-900:]
    return out
def main():
    world,tp=int(sys.argv[1]),int(sys.argv[2])
    cases=eval(sys.argv[3])
    res=on_ranks(world,run,tp,cases,timeout_s=500)
    for k in res[0]:
        print(k); 
        for r in res: print('   ', {a:float('%.2g'%b) for a,b in r[k].items()} if isinstance(r[k],dict) else r[k])
