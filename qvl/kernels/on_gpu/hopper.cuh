// What compute capability 9.0 does, in words: barriers that count bytes, tiles fetched by TMA, products of four warps.
// In front of this comes KIND, "bf16" or "f16".
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

struct alignas(64) Map { u64 words[16]; };  // CUtensorMap

__device__ void open(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ void barriers_are_open() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void wait(u32 barrier, int phase) {
  asm volatile(
      "{.reg .pred p;\n"
      "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\n"
      "bra AGAIN;\n"
      "DONE: }" ::"r"(barrier), "r"(phase) : "memory");
}
// A box of four dimensions, which begins at 0 in the first and the third.
__device__ void fetch(u32 to, const Map& map, u32 barrier, int second, int fourth) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %2, 0, %3}], [%4];"
      ::"r"(to), "l"(&map), "r"(second), "r"(fourth), "r"(barrier) : "memory");
}
// Tensor cores and TMA see what this thread wrote to shared memory.
__device__ void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ void write(u32 at, u32 number) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(number) : "memory"); }
__device__ void meet(int team) { asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory"); }
template <int COUNT> __device__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Products of four warps are under way from `end_products` until at most LEFT of such groups are waited for.
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Their numbers: the compiler may use them from here on only, and what it did to them is done here.
template <int N> __device__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ void hold(u32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}
// How their tiles lie in shared memory: strips of 16 columns, swizzled by 32 bytes; from one strip to the next.
__device__ u64 described(u32 at, u32 strip) {
  return (u64)(at >> 4) | (u64)(strip >> 4) << 16 | (u64)(256 >> 4) << 32 | 3ull << 62;
}
// Adds 16 x 16 times 16 x 8: a product of one warp.
__device__ void multiply(float* d, const u32* a, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ float power(float x) {  // of 2
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ u32 rounded(float low, float high) {
  u32 two;
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
