import sys, statistics, torch, random, itertools
sys.path.insert(0,".")
from benchmarks.head_gpu import make_head, SHAPES, Clock, TOY, exact, errors
from benchmarks.gpu_contestants import contestants
from memhead import linear_logprobs, linear_cross_entropy
from memhead.backends import hopper_tile
dev=torch.device("cuda"); clock=Clock(dev)
def once(f): return clock.once(f)
def bench(fs, rounds=9):
    t={k:[] for k in fs}; r=random.Random(0)
    for k,f in fs.items(): f(); f()
    for _ in range(rounds):
        for k in r.sample(list(fs),len(fs)): t[k].append(once(fs[k]))
    return {k:(statistics.median(v),min(v)) for k,v in t.items()}
def passes(head, softcap, chunk):
    h,w,t,g=head
    hr=h.detach().requires_grad_(); wr=w.detach().requires_grad_()
    def frozen(ent=False):
        out=linear_logprobs(hr,w,t,softcap=softcap,entropy=ent,chunk=chunk); torch.autograd.grad(out.logprobs,hr,g)
    def nograd(ent=False):
        with torch.no_grad(): linear_logprobs(h,w,t,softcap=softcap,entropy=ent,chunk=chunk)
    def train():
        torch.autograd.grad(linear_logprobs(hr,wr,t,softcap=softcap,chunk=chunk).logprobs,(hr,wr),g)
    def ce():
        torch.autograd.grad(linear_cross_entropy(hr,wr,t,softcap=softcap,chunk=chunk),(hr,wr))
    return dict(frozen=frozen,frozen_ent=lambda: frozen(True),nograd=nograd,trainable=train,ce=ce)
def floors(head):
    h,w,t,g=head
    z=torch.mm(h,w.t())
    def p1(): torch.mm(h,w.t())
    def p2(): torch.mm(torch.mm(h,w.t()),w)
    def p4(): a=torch.mm(h,w.t()); torch.mm(a,w); torch.mm(h,w.t()); torch.mm(a.t(),h)
    return dict(p1=p1,p2=p2,p4=p4)
def show(name,res):
    p={"nograd":"p1","frozen":"p2","frozen_ent":"p2","trainable":"p4","ce":"p4"}
    for k,(m,lo) in res.items():
        b=k.split("/")[0]
        print(f"{name:24s} {k:28s} {m:8.3f} min {lo:8.3f}"+(f"  {m/res[p[b]][0]:.3f}x" if b in p else ""),flush=True)
if __name__=="__main__":
    print(torch.cuda.get_device_name(), torch.__version__)
    import triton; print("triton",triton.__version__)
    for shape in (SHAPES[0],SHAPES[3]):
        head=make_head(shape,2048,True,dev); truth=exact(head,shape.softcap)
        ours=contestants(shape.softcap,compiled=False)[0]
        print(shape.name, ours.name, errors(ours,head,truth),flush=True)
        del head,truth
    head=make_head(SHAPES[0],8192,True,dev)
    fs=floors(head)
    for c in (None,(2048,67584),(4096,33792),(1024,67584),(2048,32768),(8192,16896)):
        for k,f in passes(head,None,c).items():
            if c is None or k in ("frozen","nograd"): fs[f"{k}/{c}"]=f
    show("8B N=8192",bench(fs)); 
    # kernels
    from torch.profiler import profile, ProfilerActivity
    for k in ("frozen/None","nograd/None","trainable/None"):
        with profile(activities=[ProfilerActivity.CUDA,ProfilerActivity.CPU]) as prof:
            fs[k](); torch.cuda.synchronize()
        rows=sorted(prof.key_averages(),key=lambda e:-e.device_time_total)
        print(k); 
        for e in rows[:40]:
            if e.device_type.name!="CPU" and e.device_time_total>20: print(f"   {e.key[:90]:90s} n={e.count} {e.device_time_total/1e3:.3f} ms")
    for G in (8,32):
        hopper_tile.BLOCKS["GROUP"]=G
        fs2=floors(head); fs2.update({k:f for k,f in passes(head,None,None).items() if k in("frozen","nograd")})
        show(f"GROUP={G}",bench(fs2,5))
    hopper_tile.BLOCKS["GROUP"]=16
    del head
    for shape,n in ((SHAPES[1],8192),(SHAPES[2],8192),(SHAPES[3],8192),(SHAPES[0],2048),(SHAPES[0],32768)):
        head=make_head(shape,n,True,dev); fs=floors(head); fs.update(passes(head,shape.softcap,None))
        if n==32768: fs={k:v for k,v in fs.items() if k in("p1","p2","nograd","frozen")}
        show(f"{shape.name} {n}",bench(fs,5)); del head,fs; torch.cuda.empty_cache()
