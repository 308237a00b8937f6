// allocate_zeroed: pieces are zeroed, aligned, apart from each other, and free in any order.
#include "pyllmlite/memory.h"

#include <algorithm>
#include <new>

#include "harness.h"

using harness::check;
using pyllmlite::allocate_zeroed;

namespace {

struct Piece {
  std::shared_ptr<void> memory;
  size_t bytes;
  unsigned char mark;
};

bool holds(const Piece& piece, unsigned char value) {
  const unsigned char* p = static_cast<const unsigned char*>(piece.memory.get());
  return std::all_of(p, p + piece.bytes, [value](unsigned char c) { return c == value; });
}

void test_pieces() {
  const size_t sizes[] = {0,       1,       63,         64,        32 << 10, (32 << 10) + 1,
                          1 << 20, 5 << 20, 16u << 20, 33u << 20, 100,      7 << 20};
  std::vector<Piece> pieces;
  unsigned random = 1;
  for (int round = 0; round < 60; ++round) {
    random = random * 1664525 + 1013904223;
    const size_t bytes = sizes[(random >> 16) % std::size(sizes)];
    Piece piece{allocate_zeroed(bytes), bytes, static_cast<unsigned char>(round + 1)};
    check(reinterpret_cast<size_t>(piece.memory.get()) % 64 == 0, "%zu bytes: aligned", bytes);
    check(holds(piece, 0), "%zu bytes: zeroed", bytes);
    std::memset(piece.memory.get(), piece.mark, bytes);
    pieces.push_back(piece);
    if (pieces.size() > 8) {
      const size_t gone = (random >> 8) % pieces.size();
      check(holds(pieces[gone], pieces[gone].mark), "nobody else wrote to a piece");
      pieces.erase(pieces.begin() + gone);
    }
  }
  for (const Piece& piece : pieces) check(holds(piece, piece.mark), "kept to the end");
}

void test_too_much() {
  bool thrown = false;
  try {
    allocate_zeroed(size_t(1) << 60);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  check(thrown, "an absurd size is refused");
}

}  // namespace

int main() {
  test_pieces();
#ifndef __SANITIZE_ADDRESS__  // which ends the process instead
  test_too_much();
#endif
  return harness::finish();
}
