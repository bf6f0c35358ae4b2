// Attention inside segments for compute capability 9.0, in CUDA: there tensor cores multiply by any eight columns, in
// Gluon by powers of two only.
//
// A block has a multiprocessor alone. One thread fetches keys and values by TMA, 64 of them a turn; three teams of four
// warps take 64 query rows of a tile each, and multiply while they take exponentials. A row's sum of weights is one
// more column of the product with values: ones lie beside them in shared memory.
//
// A softmax may be shifted by any number. A bfloat16 reaches as far as a float: its scores are not shifted, and nothing
// searches for a maximum. Those of a float16 are, by the maximum of a row's first keys. Where the sum of a row is out
// of range at the end, its warp computes it again, slowly.
//
// In front of this come hopper.cuh and attention_shares.cuh, and from attention_pictures.py: D, HALF (float16),
// `add_scores` and `add_values`.

constexpr int TEAMS = 3, TEAM = 128, ROWS = 64, STAGES = 4;  // a team's threads and query rows; turns fetched ahead
constexpr int STRIP = KEYS * 32, TILE = D / 16 * STRIP;      // bytes of 16 columns; of a head
constexpr int AT_VALUES = STAGES * TILE, VALUES = TILE + STRIP, AT_BARRIERS = AT_VALUES + STAGES * VALUES;
constexpr int SUMS = D / 2 + 4, KEPT = SUMS + 2;             // numbers of a thread: sums; and two shifts
constexpr int NOBODY = 0, WRITING = 1, WRITTEN = 2;          // was at a place for sums
constexpr int TEAM_REGISTERS = 160, FETCH_REGISTERS = 32;
constexpr u32 ONES = HALF ? 0x3c003c00 : 0x3f803f80;
constexpr float NOTHING = -1e30f, MARGIN = 10, LEAST = 0x1p-100f, MOST = HALF ? 0x1p15f : 0x1p100f;

__device__ float most_of_row(float x) {  // four neighbours hold a row
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ int phase_of(int turn) { return turn / STAGES & 1; }

struct Places {  // in shared memory
  u32 base;
  __device__ u32 keys(int turn) const { return base + turn % STAGES * TILE; }
  __device__ u32 values(int turn) const { return base + AT_VALUES + turn % STAGES * VALUES; }
  __device__ u32 keys_full(int turn) const { return base + AT_BARRIERS + 8 * (turn % STAGES); }
  __device__ u32 keys_empty(int turn) const { return keys_full(turn) + 8 * STAGES; }
  __device__ u32 values_full(int turn) const { return keys_full(turn) + 16 * STAGES; }
  __device__ u32 values_empty(int turn) const { return keys_full(turn) + 24 * STAGES; }
};

__device__ void fetch_all(const Places& at, const Map& map, Pieces pieces, int heads) {
  Piece piece;
  for (int n = 0; pieces.next(piece);) {
    for (int turn = piece.to - 1; turn >= piece.from; turn--, n++) {
      const int row = piece.tile.key + turn * KEYS;
      wait(at.keys_empty(n), 1 - phase_of(n));
      expect(at.keys_full(n), TILE);
      fetch(at.keys(n), map, at.keys_full(n), row, heads + piece.head);
      wait(at.values_empty(n), 1 - phase_of(n));
      expect(at.values_full(n), TILE);
      fetch(at.values(n), map, at.values_full(n), row, 2 * heads + piece.head);
    }
  }
}

struct Team {
  const Places at;
  const int team, me = threadIdx.x % TEAM, lane = me % 32;
  const int row = me / 32 * 16 + lane / 4, twin = lane % 4;  // this row and the eighth after it; four threads have them
  u32 q[D / 4], weights[KEYS / 4];
  float s[KEYS / 2], acc[SUMS], shift[2];

  __device__ Team(const Places& at, int team) : at(at), team(team) {}

  __device__ void read_queries(const u32* from, int stride, int last) {
#pragma unroll
    for (int i = 0; i < D / 4; i++)
      q[i] = from[min(row + i % 2 * 8, last) * stride + i / 4 * 8 + i / 2 % 2 * 4 + twin];
  }
  __device__ void begin_scores(int n) {
    hold(q), hold(s), hold(weights);
    begin_products();
    const u64 keys = described(at.keys(n), STRIP);
#pragma unroll
    for (int i = 0; i < D / 16; i++) add_scores(s, q + 4 * i, keys + i * (STRIP / 16), i > 0);
    end_products();
  }
  __device__ void begin_values(int n) {
    hold(weights);
    begin_products();
    const u64 values = described(at.values(n), STRIP);
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) add_values(acc, weights + 4 * i, values + i * 32);
    end_products();
  }
  __device__ void give_back(u32 barrier) { if (lane == 0) arrive(barrier); }
  __device__ void exponentials() {
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) s[i] = power(HALF ? s[i] - shift[i / 2 % 2] : s[i]);
  }
  __device__ void round_weights() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) weights[i] = rounded(s[2 * i], s[2 * i + 1]);
  }
  // The last keys of a tile, where there may be fewer than a turn has.
  __device__ void first_turn(int n, int left) {
    wait(at.keys_full(n), phase_of(n));
    begin_scores(n);
    wait_for_products<0>();
    hold(s);
    give_back(at.keys_empty(n));
    float most[2] = {NOTHING, NOTHING};
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
      if (i / 4 * 8 + twin * 2 + i % 2 >= left) s[i] = NOTHING;
      most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) shift[r] = HALF ? most_of_row(most[r]) + MARGIN : 0;
    exponentials();
    round_weights();
#pragma unroll
    for (int i = 0; i < SUMS; i++) acc[i] = 0;
    wait(at.values_full(n), phase_of(n));
    if (left >= KEYS) return;
    // What lies behind the segment may be anything, and 0 * nan is nan. Every team writes the same.
    for (int i = me; i < (KEYS - left) * (D / 2); i += TEAM)
      write(at.values(n) + i / (8 * (KEYS - left)) * STRIP + left * 32 + i % (8 * (KEYS - left)) * 4, 0);
    written();
    meet(team);
  }
  // Turns from n on. The scores of one are under way while the values of the one before are added. (n is counted by
  // ones, or the compiler would not know that all threads have the same.)
  __device__ void attend(int& n, int end, int left) {
    first_turn(n, left);
    if (n + 1 < end) wait(at.keys_full(n + 1), phase_of(n + 1));
    for (n++; n < end; n++) {
      begin_scores(n);
      wait(at.values_full(n - 1), phase_of(n - 1));
      begin_values(n - 1);
      wait_for_products<1>();
      hold(s);
      give_back(at.keys_empty(n));
      exponentials();
      if (n + 1 < end) wait(at.keys_full(n + 1), phase_of(n + 1));  // here, or the assembler waits for the values first
      wait_for_products<0>();
      hold(acc), hold(weights);
      give_back(at.values_empty(n - 1));
      round_weights();
    }
    wait(at.values_full(n - 1), phase_of(n - 1));
    begin_values(n - 1);
    wait_for_products<0>();
    hold(acc);
    give_back(at.values_empty(n - 1));
  }
  __device__ void skip(int& n, int end) {  // without rows in the tile
    for (; n < end; n++) {
      wait(at.keys_full(n), phase_of(n));
      give_back(at.keys_empty(n));
      wait(at.values_full(n), phase_of(n));
      give_back(at.values_empty(n));
    }
  }
  // A warp's sums of a part of its tile, where another block has the other part: true if that one will finish the rows.
  // Who comes first leaves sums, who comes second waits until they are written, which is soon, and adds. The result
  // does not depend on who that is.
  __device__ bool leave(float* sums, int* state) {
    if (__any_sync(~0u, lane == 0 && atomicCAS(state, NOBODY, WRITING) == NOBODY)) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) sums[i * 32 + lane] = acc[i];
      for (int r = 0; r < 2; r++) sums[(SUMS + r) * 32 + lane] = shift[r];
      __threadfence();
      __syncwarp();
      if (lane == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(state), "r"(WRITTEN) : "memory");
      return true;
    }
    int now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(state) : "memory");
    while (__any_sync(~0u, now != WRITTEN));
    float mine[2], theirs[2];
    for (int r = 0; r < 2; r++) {
      const float other = __ldcg(sums + (SUMS + r) * 32 + lane), common = fmaxf(shift[r], other);
      mine[r] = power(shift[r] - common), theirs[r] = power(other - common);
    }
#pragma unroll
    for (int i = 0; i < SUMS; i++) {
      const float more = __ldcg(sums + i * 32 + lane);
      acc[i] = __fadd_rn(__fmul_rn(acc[i], mine[i / 2 % 2]), __fmul_rn(more, theirs[i / 2 % 2]));
    }
    __syncwarp();
    if (lane == 0) *state = NOBODY;
    return false;
  }
  __device__ float sum(int r) const { return acc[SUMS - 4 + 2 * r]; }
  __device__ bool beyond(int live) const {
    bool out = false;
    for (int r = 0; r < 2; r++) out |= row + 8 * r < live && !(sum(r) > LEAST && sum(r) < MOST);
    return __any_sync(~0u, out);
  }
  // A warp's rows against all keys once more, with a running maximum: straight from memory, as this is hardly needed.
  __device__ void attend_again(const u32* keys, const u32* values, int stride, int count) {
    float most[2] = {NOTHING, NOTHING};
#pragma unroll
    for (int i = 0; i < SUMS; i++) acc[i] = 0;
    for (int first = 0; first < count; first += 16) {
      float x[8] = {0, 0, 0, 0, 0, 0, 0, 0}, sums[2] = {0, 0}, fade[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const u32* key = keys + (i64)min(first + half * 8 + lane / 4, count - 1) * stride + twin;
#pragma unroll
        for (int i = 0; i < D / 16; i++) multiply(x + 4 * half, q + 4 * i, key[8 * i], key[8 * i + 4]);
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float now = most[r];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float& score = x[i / 2 * 4 + 2 * r + i % 2];
          if (first + i / 2 * 8 + twin * 2 + i % 2 >= count) score = NOTHING;
          now = fmaxf(now, score);
        }
        now = most_of_row(now);
        fade[r] = power(most[r] - now), most[r] = now;
#pragma unroll
        for (int i = 0; i < 4; i++) sums[r] += x[i / 2 * 4 + 2 * r + i % 2] = power(x[i / 2 * 4 + 2 * r + i % 2] - now);
      }
#pragma unroll
      for (int i = 0; i < SUMS; i++) acc[i] *= fade[i / 2 % 2];
      const u32 p[4] = {rounded(x[0], x[1]), rounded(x[2], x[3]), rounded(x[4], x[5]), rounded(x[6], x[7])};
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        u32 two[2];
        for (int half = 0; half < 2; half++) {
          u32 both[2];
          for (int k = 0; k < 2; k++) {
            const int key = first + half * 8 + twin * 2 + k;
            both[k] = key < count ? ((const unsigned short*)(values + (i64)key * stride))[i * 8 + lane / 4] : 0;
          }
          two[half] = both[0] | both[1] << 16;
        }
        multiply(acc + 4 * i, p, two[0], two[1]);
      }
      for (int r = 0; r < 2; r++) acc[SUMS - 4 + 2 * r] += sums[r];
    }
    for (int r = 0; r < 2; r++) {
      float& whole = acc[SUMS - 4 + 2 * r];
      whole += __shfl_xor_sync(~0u, whole, 1);
      whole += __shfl_xor_sync(~0u, whole, 2);
    }
  }
  __device__ void store(u32* to, int stride, int live) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float part = 1 / sum(r);
      if (row + 8 * r >= live) continue;
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        to[(row + 8 * r) * stride + 4 * i + twin] = rounded(acc[4 * i + 2 * r] * part, acc[4 * i + 2 * r + 1] * part);
    }
  }
};

__device__ void attend_all(
    const Places& at, Pieces pieces, u32* qkv, int heads, float* sums, int* states, int number) {
  Team team(at, number);
  const int width = heads * (D / 2), stride = 3 * width;  // in pairs
  Piece piece;
  for (int n = 0; pieces.next(piece);) {
    const Tile& tile = piece.tile;
    const int first = number * ROWS, live = tile.rows - first, end = n + piece.to - piece.from;
    if (live > 0) {
      u32* queries = qkv + (i64)(tile.row + first) * stride + piece.head * (D / 2);
      team.read_queries(queries, stride, live - 1);
      team.attend(n, end, tile.keys - (piece.to - 1) * KEYS);
      const int place = (piece.place * TEAMS + number) * (TEAM / 32) + team.me / 32;
      const bool left = piece.place >= 0 && team.leave(sums + (i64)place * KEPT * 32, states + place);
      if (!left) {
        const u32* keys = qkv + (i64)tile.key * stride + width + piece.head * (D / 2);
        if (team.beyond(live)) team.attend_again(keys, keys + width, stride, tile.keys);
        team.store(queries, stride, live);
      }
    } else team.skip(n, end);
  }
}

// qkv [n, 3, heads, D], queries times what makes scores powers of 2; the results go where they are. Places for the sums
// of warps, and their states: all NOBODY, before and after.
extern "C" __global__ void __launch_bounds__((TEAMS + 1) * TEAM, 1) attend(
    const __grid_constant__ Map map, const Tile* tiles, int count, u32* qkv, int heads, float* sums, int* states) {
  extern __shared__ char shared[];
  Places at;
  asm("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(at.base) : "l"(shared));
  at.base = (at.base + 255) & ~255u;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      open(at.keys_full(i), 1), open(at.values_full(i), 1);
      open(at.keys_empty(i), TEAMS * TEAM / 32), open(at.values_empty(i), TEAMS * TEAM / 32);
    }
    barriers_are_open();
  }
  for (int i = threadIdx.x; i < STAGES * STRIP / 4; i += blockDim.x)
    write(at.values(i / (STRIP / 4)) + TILE + i % (STRIP / 4) * 4, ONES);
  written();
  __shared__ Share share;
  if (threadIdx.x < 32) {
    const Share found = share_of(tiles, count, heads);
    if (threadIdx.x == 0) share = found;
  }
  __syncthreads();
  const Pieces pieces = {tiles, count, share};
  const int number = __shfl_sync(~0u, threadIdx.x / TEAM, 0);
  if (number == TEAMS) {
    fewer_registers<FETCH_REGISTERS>();
    if (threadIdx.x == TEAMS * TEAM) fetch_all(at, map, pieces, heads);
  } else {
    more_registers<TEAM_REGISTERS>();
    attend_all(at, pieces, qkv, heads, sums, states, number);
  }
}
