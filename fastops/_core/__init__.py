"""What everything else is made from.

loader                the extension, or why it does not load
registry              the table of ops; declarations enter themselves
declaration           the body of an elementwise function
arguments             torch's error for what is no tensor
usable                which tensors the kernels take
by_torch              what torch would run: the off switch
fallback              what a call becomes that the kernels refuse
fake, vmap, compile, decompositions
                      what is registered with torch for every op
explain               which kernel a call runs
"""
