// The proto files as they are: nothing is generated. Copied elsewhere, these two folders are all there is to change.
import { fileURLToPath } from 'node:url';
import protoLoader from '@grpc/proto-loader';

const FOLDERS = ['../../proto', '../proto'].map((path) => fileURLToPath(new URL(path, import.meta.url)));
const FILES = [
  'queryselect/v1/selection.proto',
  'queryselect/v1/server.proto',
  'queryselect/v1/strategy.proto',
  'google/rpc/status.proto',
  'google/rpc/error_details.proto',
];

/** Every message and service by its full name. Fields that are not set are undefined, and int64 are texts. */
export const definition = protoLoader.loadSync(FILES, {
  includeDirs: FOLDERS,
  keepCase: true,
  longs: String,
  enums: String,
});
