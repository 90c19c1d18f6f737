package runtime

import (
	"context"
	"errors"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"knarr/node/shim"
)

// Reasons of a container's end, as upstream's runtimes spell them.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonUnknown    = "Unknown"
	// startErrorCode is the exit code of a container that could not be started.
	startErrorCode = 128
)

func notFound(kind, id string) error {
	return status.Errorf(codes.NotFound, "%s %q: not found", kind, id)
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

func precondition(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, args...)
}

// rpcError gives err the status code of its kind, keeping one that it has.
func rpcError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	code := codes.Unknown
	var told *shim.Error
	switch {
	case errors.As(err, &told):
		code = shimCode(told.Code)
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errdefs.IsNotFound(err):
		code = codes.NotFound
	case errdefs.IsInvalidArgument(err):
		code = codes.InvalidArgument
	}
	return status.Error(code, err.Error())
}

func shimCode(code string) codes.Code {
	switch code {
	case shim.CodeNotFound:
		return codes.NotFound
	case shim.CodeExists:
		return codes.AlreadyExists
	case shim.CodeState:
		return codes.FailedPrecondition
	case shim.CodeInvalid:
		return codes.InvalidArgument
	}
	return codes.Unknown
}

// shimNotFound tells whether the shim does not know the container.
func shimNotFound(err error) bool {
	var told *shim.Error
	return errors.As(err, &told) && told.Code == shim.CodeNotFound
}
