// Which block attends to which keys of which tile: turns are shared equally, not tiles.
//
//   turns of a head   | tile 0 ........ | tile 1 ........ | tile 2 ........ |
//   blocks            | number 1     | number 2    | number 3    | ...
//
// Each takes a tile's keys from the last to the first. No tile is cut twice: where one is, a block begins with its
// first keys, and the one before ends with the others, long after.

struct Tile { int row, rows, key, keys; };  // query rows; the keys of their segment
struct Piece {
  Tile tile;
  int head, from, to;  // turns of the tile
  int place;           // of sums, if another block has other turns of the tile; or -1
};
struct Share { int index, head, part, left, number; };  // the first tile, and the turns of it that are another block's

__device__ int turns_of(const Tile& tile) { return tile.rows > 0 ? (tile.keys + KEYS - 1) / KEYS : 0; }

// By one warp; `tiles` begin with the longest.
__device__ Share share_of(const Tile* tiles, int count, int heads) {
  int of_head = 0;
  for (int i = threadIdx.x % 32; i < count; i += 32) of_head += turns_of(tiles[i]);
  for (int apart = 16; apart > 0; apart /= 2) of_head += __shfl_xor_sync(~0u, of_head, apart);
  const i64 all = (i64)of_head * heads;
  const int blocks = (int)min((i64)gridDim.x, all / max(1, turns_of(tiles[0])));
  Share share = {0, 0, 0, 0, (int)blockIdx.x};
  if (share.number >= blocks) return share;
  const i64 start = all * share.number / blocks;
  share.left = (int)(all * (share.number + 1) / blocks - start);
  share.head = (int)(start / of_head), share.part = (int)(start % of_head);
  for (; share.part >= turns_of(tiles[share.index]); share.index++) share.part -= turns_of(tiles[share.index]);
  return share;
}

struct Pieces {
  const Tile* tiles;
  int count;
  Share share;

  __device__ bool next(Piece& piece) {
    if (share.left == 0) return false;
    for (piece.tile = tiles[share.index]; turns_of(piece.tile) == 0; piece.tile = tiles[share.index]) advance();
    const int turns = turns_of(piece.tile), here = min(turns - share.part, share.left);
    piece.head = share.head, piece.to = turns - share.part, piece.from = piece.to - here;
    piece.place = share.part > 0 ? share.number - 1 : piece.from > 0 ? share.number : -1;
    share.left -= here, share.part = 0;
    advance();
    return true;
  }
  __device__ void advance() {
    if (++share.index == count) share.index = 0, share.head++;
  }
};
