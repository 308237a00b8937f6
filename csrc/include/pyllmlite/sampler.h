/* Sampling state that persists across steps, one row per running sequence, and the
 * results of a step.  No Python touches the vocabulary: everything here is applied
 * natively at the end of the Program. */
#ifndef PYLLMLITE_SAMPLER_H
#define PYLLMLITE_SAMPLER_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How a row's next token is chosen.  Order: bitmask and bias and banned tokens,
 * penalties (repetition, then frequency and presence), logprobs are taken of the raw
 * logits' log-softmax, temperature, min_p, top_k, top_p, then inverse CDF in the order
 * of token ids with one Philox4x32-10 draw keyed by (seed, position of the new token).
 *
 * min_p keeps tokens of at least min_p times the best one's probability; top_k keeps the k
 * best and whatever equals the k-th; top_p then keeps the smallest set, of the renormalized
 * probabilities in falling order (equal ones by rising id), that reaches top_p. */
typedef struct pll_sampling_params {
  float temperature;        /* below 1e-5: greedy, the lowest id among equal maxima */
  float top_p;              /* 1: off */
  float min_p;              /* 0: off */
  int32_t top_k;            /* 0: off */
  float repetition_penalty; /* 1: off; Keskar et al. 2019 */
  float presence_penalty;   /* 0: off; over generated tokens, as in the OpenAI API */
  float frequency_penalty;  /* 0: off */
  int32_t num_logprobs;     /* -1: none; n >= 0: of the chosen token and the n best */
  uint64_t seed;
  int32_t prompt_len;       /* tokens before this position are the prompt's */
  int32_t min_len;          /* banned ids may not come before this position */
  int32_t num_bias;         /* logit_bias entries: added to the logits */
  int32_t num_banned;       /* stop token ids, held back by min_tokens */
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* banned_ids;
  /* Nonzero: top_ids are the best tokens after mask, biases, bans and penalties, and their
   * log-probabilities count what was added: logits then less the raw logits' log of the sum of
   * exponentials, which is not taken anew (as transformers' processors do in a beam search; -inf:
   * not allowed).  0: of the raw logits. */
  int32_t top_of_processed;
} pll_sampling_params;

/* Biases of one row for one step, added to the logits besides its logit_bias. */
typedef struct pll_step_bias {
  int32_t count;
  const int32_t* ids;
  const float* values;
} pll_step_bias;

/* Read by the sampler through pll_batch.sampler. */
typedef struct pll_sampler_inputs {
  uint32_t struct_size;
  int32_t max_model_len;               /* columns of token_table */
  int32_t* token_table;                /* [max_rows, max_model_len] every known token of a row;
                                          draft tokens stand behind the computed ones */
  const pll_sampling_params* params;   /* [max_rows] */
  const int32_t* logit_row_of;         /* [num_logit_rows] persistent row of each logit row */
  /* Token bitmask of each logit row, bit t of word t/32 set: allowed; NULL: all allowed. */
  const uint32_t* const* masks;        /* [num_logit_rows] or NULL */
  const pll_step_bias* step_biases;    /* [max_rows], count 0 where there are none; or NULL */
  /* Token whose logprob is asked for (prompt_logprobs, verification); -1: none, sample. */
  const int32_t* targets;              /* [num_logit_rows] */
  int32_t max_logprobs;                /* columns of top_ids and top_logprobs */
  /* Results. */
  int32_t* tokens;                     /* [num_logit_rows] sampled token; for rows with a
                                          target the target itself */
  float* logprobs;                     /* [num_logit_rows] log-probability of tokens[i];
                                          NaN where num_logprobs is -1 and there is no target */
  int32_t* ranks;                      /* [num_logit_rows] 1: the most likely, equal ones by rising
                                          id; 0 where logprobs is NaN */
  int32_t* top_ids;                    /* [num_logit_rows, max_logprobs], best first; columns past
                                          num_logprobs are not written */
  float* top_logprobs;                 /* [num_logit_rows, max_logprobs] */
  int32_t* status;                     /* [num_logit_rows] 0; 1: a logit is NaN or +inf; 2: the
                                          mask or the bans allow no token; tokens[i] is then 0 */
  float* const* logits;                /* [num_logit_rows] or NULL: an entry that is not NULL
                                          ([vocab_size]) gets a copy of the row's raw logits,
                                          taken before anything is applied to them */
  int32_t vocab_size;                  /* that the masks, ids and copies above are made for */
} pll_sampler_inputs;

#ifdef __cplusplus
}
#endif
#endif
