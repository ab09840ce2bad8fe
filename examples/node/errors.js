// What a failed call tells: a google.rpc.Status with details, in the trailer grpc-status-details-bin.
import grpc from '@grpc/grpc-js';
import { definition } from './protos.js';

/**
 * A failed call. code: gRPC's name for it, such as INVALID_ARGUMENT. reason: QuerySelect's own, such as INVALID_INPUT.
 * field: the path of what is wrong, such as pool.embeddings. retryAfter: seconds, where the server says when to come
 * back. retryable: whether the same call may succeed later. Texts are empty where the server does not say.
 */
export class QuerySelectError extends Error {
  constructor(failure) {
    super(failure.details);
    const [packed] = failure.metadata?.get('grpc-status-details-bin') ?? [];
    const { ErrorInfo = {}, BadRequest = {}, RetryInfo } = packed ? unpacked(packed) : {};
    const [pushback] = failure.metadata?.get('grpc-retry-pushback-ms') ?? [];
    this.name = 'QuerySelectError';
    this.code = grpc.status[failure.code];
    this.reason = ErrorInfo.reason ?? '';
    this.info = ErrorInfo.metadata ?? {};
    this.field = BadRequest.field_violations?.[0]?.field ?? '';
    this.requestId = failure.metadata?.get('x-request-id')[0] ?? '';
    this.retryAfter = RetryInfo && seconds(RetryInfo.retry_delay);
    // gRPC's own RESOURCE_EXHAUSTED, of a message that is too long, has no RetryInfo: it would never fit. A pushback that
    // is no number says: never again.
    const passing = ['UNAVAILABLE', 'DATA_LOSS'].includes(this.code) || RetryInfo !== undefined;
    this.retryable = passing && (pushback === undefined || /^\d+$/.test(pushback));
  }
}

function unpacked(bytes) {
  const found = {};
  try {
    for (const { type_url, value } of definition['google.rpc.Status'].deserialize(bytes).details ?? []) {
      const name = type_url.split('/').pop();
      if (name in definition) found[name.split('.').pop()] = definition[name].deserialize(value); // others are newer
    }
  } catch {
    // No details, whatever made them: the code counts all the same.
  }
  return found;
}

const seconds = ({ seconds = 0, nanos = 0 }) => Number(seconds) + nanos / 1e9;
