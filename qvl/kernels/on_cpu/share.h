/* Sharing the pieces of a call between threads; see share.c. */
#pragma once

typedef void share_work(const void *what, long piece);

/* work(what, piece) once for every piece in [0, count), by at most `threads` threads; the caller is one of them. */
void qvl_share(long count, int threads, share_work *work, const void *what);
