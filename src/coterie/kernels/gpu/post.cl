// post. One work-group; everything before it in the queue is done.

kernel void NAME(PARAMETERS) {
    if (get_global_id(0) + get_global_id(1) != 0) return;
    const long epoch = ((global const long *)(a + step))[STEP_EPOCH];
    mem_fence(CLK_GLOBAL_MEM_FENCE);
#ifdef cl_khr_int64_base_atomics
    atom_xchg((volatile global long *)(a + flag), epoch);
#else
    *(volatile global long *)(a + flag) = epoch;
#endif
    mem_fence(CLK_GLOBAL_MEM_FENCE);
}
