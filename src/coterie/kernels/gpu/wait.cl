// wait. One work-group, which holds the queue up until another unit has posted the flag for this step, or the step is
// called off. Its first work-item alone looks, so that none stands in a branch that others have left.

kernel void NAME(PARAMETERS) {
    if (get_global_id(0) + get_global_id(1) != 0) return;
    const long epoch = ((global const long *)(a + step))[STEP_EPOCH];
    volatile global const long *posted = (volatile global const long *)(a + flag);
    volatile global const long *off = (volatile global const long *)(a + abort_word);
    while (*posted - epoch < 0 && *off == 0) mem_fence(CLK_GLOBAL_MEM_FENCE);
    mem_fence(CLK_GLOBAL_MEM_FENCE);
}
