/* What src/lib.rs asks of Intel's library. It is C because the library's interface is C's: macros that go through the
 * function pointers of a manager, and structures that only its header knows. Every pointer is the caller's to vouch for;
 * nothing is kept of them after a call. Lengths are bytes. */
#include <intel-ipsec-mb.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { NONCE_LEN = 12, KEY_LEN = 32, TAG_LEN = 16, SCHEDULE_LEN = 1024 };

_Static_assert(sizeof(struct gcm_key_data) <= SCHEDULE_LEN, "src/lib.rs has room for the key schedule");

/* A manager for one thread; NULL if the archive is of another version than the header, without memory, without the
 * instructions that make the library worth it (AVX-512 with IFMA, VAES and VPCLMULQDQ), or if the library's own test of
 * its algorithms failed. */
IMB_MGR *tidegate_mb_new(void)
{
    const uint64_t needed = IMB_CPUFLAGS_AVX512_T2 | IMB_FEATURE_SELF_TEST_PASS;
    IMB_MGR *manager;
    if (imb_get_version() != IMB_VERSION_NUM)
        return NULL;
    manager = alloc_mb_mgr(0);
    if (manager == NULL)
        return NULL;
    init_mb_mgr_auto(manager, NULL);
    if (imb_get_errno(manager) != 0 || (manager->features & needed) != needed) {
        free_mb_mgr(manager);
        return NULL;
    }
    return manager;
}

/* Whether the library's calls leave `imb_errno`, which all threads share, alone as long as nothing fails. */
int tidegate_mb_shares_nothing(void)
{
    return IMB_VERSION_NUM >= IMB_VERSION(1, 4, 0);
}

void tidegate_mb_free(IMB_MGR *manager)
{
    free_mb_mgr(manager);
}

/* Writes the key schedule of an AES-256-GCM key. `schedule` is aligned to 64 bytes, and stays as it is if the library
 * refuses. */
void tidegate_mb_schedule(IMB_MGR *manager, const uint8_t key[KEY_LEN], uint8_t schedule[SCHEDULE_LEN])
{
    IMB_AES256_GCM_PRE(manager, key, (struct gcm_key_data *)schedule);
}

/* Seals (or opens) `len` bytes of `from` into `to`, which may be the same place, and writes the tag that belongs to
 * them. No associated data. Returns whether it was done.
 *
 * The library tells of a refusal in one variable of the whole process, which the next call of another thread overwrites.
 * But it leaves the tag as it was; and a tag of zeros comes up once in 2^128. (A job with a status costs 15 ns more.) */
int tidegate_mb_aes_gcm(IMB_MGR *manager, const uint8_t schedule[SCHEDULE_LEN], int seals,
                        const uint8_t nonce[NONCE_LEN], const uint8_t *from, uint8_t *to, size_t len,
                        uint8_t tag[TAG_LEN])
{
    static const uint8_t untouched[TAG_LEN];
    const struct gcm_key_data *key = (const struct gcm_key_data *)schedule;
    struct gcm_context_data context;
    memcpy(tag, untouched, TAG_LEN);
    if (seals)
        IMB_AES256_GCM_ENC(manager, key, &context, to, from, len, nonce, nonce, 0, tag, TAG_LEN);
    else
        IMB_AES256_GCM_DEC(manager, key, &context, to, from, len, nonce, nonce, 0, tag, TAG_LEN);
    return memcmp(tag, untouched, TAG_LEN) != 0;
}

/* The same with ChaCha20-Poly1305. It goes through the manager's queue, which does a job of this kind at once: an eighth
 * faster than the library's calls for a message in parts. Returns whether it was done. */
int tidegate_mb_chacha_poly(IMB_MGR *manager, const uint8_t key[KEY_LEN], int seals, const uint8_t nonce[NONCE_LEN],
                            const uint8_t *from, uint8_t *to, size_t len, uint8_t tag[TAG_LEN])
{
    IMB_JOB *const job = IMB_GET_NEXT_JOB(manager), *done;
    job->cipher_mode = IMB_CIPHER_CHACHA20_POLY1305;
    job->hash_alg = IMB_AUTH_CHACHA20_POLY1305;
    job->cipher_direction = seals ? IMB_DIR_ENCRYPT : IMB_DIR_DECRYPT;
    job->chain_order = seals ? IMB_ORDER_CIPHER_HASH : IMB_ORDER_HASH_CIPHER;
    job->enc_keys = key;
    job->dec_keys = key;
    job->key_len_in_bytes = KEY_LEN;
    job->iv = nonce;
    job->iv_len_in_bytes = NONCE_LEN;
    job->src = from;
    job->dst = to;
    job->cipher_start_src_offset_in_bytes = 0;
    job->msg_len_to_cipher_in_bytes = len;
    job->hash_start_src_offset_in_bytes = 0;
    job->msg_len_to_hash_in_bytes = len;
    job->u.CHACHA20_POLY1305.aad = nonce; /* of no bytes, but not NULL */
    job->u.CHACHA20_POLY1305.aad_len_in_bytes = 0;
    job->auth_tag_output = tag;
    job->auth_tag_output_len_in_bytes = TAG_LEN;
    done = IMB_SUBMIT_JOB(manager);
    while (done != job) { /* not in 1.3; but nothing may stay in the queue, for it points to the caller's memory */
        done = IMB_FLUSH_JOB(manager);
        if (done == NULL)
            return 0;
    }
    return job->status == IMB_STATUS_COMPLETED;
}
