// Package options are the settings of the API server that upstream's kube-apiserver has, too: its own option types, with its own flags,
// defaults and checks. It is apart from the server so that the command line can offer the flags without the server.
package options

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/apis/apiserver"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/apis/apiserver/validation"
	"k8s.io/apiserver/pkg/audit/policy"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"
)

// Options of an API server. Make them with New.
type Options struct {
	// Audit says what is recorded of requests, and where; without a policy nothing is.
	Audit *genericoptions.AuditOptions
	// Authentication is who else is believed: OIDC, a webhook, a file of tokens, a file of structured configuration, anonymous requests.
	// Client certificates, the front proxy, service-account and bootstrap tokens are knarr's own and always on.
	Authentication *kubeoptions.BuiltInAuthenticationOptions
	// Authorization is who decides; by default what a node needs for its own pods, then RBAC.
	Authorization *kubeoptions.BuiltInAuthorizationOptions
	// Admission is which plugins see a write, by default upstream's set.
	Admission *kubeoptions.AdmissionOptions
	// Encryption is how resources are encrypted at rest.
	Encryption Encryption
	// Profiling offers the runtime's profiles under /debug/pprof, to who may get that path. On by default.
	Profiling bool
	// ContentionProfiling measures each wait of a goroutine for /debug/pprof/block, which costs; nothing without Profiling.
	ContentionProfiling bool
}

// Encryption names a file of the operator's own. The zero value means knarr's file, which it makes and rotates.
type Encryption struct {
	// File is in upstream's EncryptionConfiguration format.
	File string
	// Reload takes changes of the file over while the server runs.
	Reload bool
}

// New are the defaults.
func New() *Options {
	authorization := kubeoptions.NewBuiltInAuthorizationOptions()
	authorization.Modes = []string{modes.ModeNode, modes.ModeRBAC}
	return &Options{
		Audit:          genericoptions.NewAuditOptions(),
		Authentication: kubeoptions.NewBuiltInAuthenticationOptions().WithAnonymous().WithOIDC().WithTokenFile().WithWebHook(),
		Authorization:  authorization,
		Admission:      kubeoptions.NewAdmissionOptions(),
		Profiling:      true,
	}
}

// Flags adds upstream's flags, in groups for the help.
func (o *Options) Flags(groups *cliflag.NamedFlagSets) {
	o.Authentication.AddFlags(groups.FlagSet("authentication"))
	o.Authorization.AddFlags(groups.FlagSet("authorization"))
	f := groups.FlagSet("admission")
	o.Admission.GenericAdmission.AddFlags(f)
	shorten(f)
	f = groups.FlagSet("encryption at rest")
	f.StringVar(&o.Encryption.File, "encryption-provider-config", "", "file that says which resources are encrypted at rest, with which keys; "+
		"by default knarr makes one for Secrets, whose key `knarr secrets-encrypt rotate` replaces")
	f.BoolVar(&o.Encryption.Reload, "encryption-provider-config-automatic-reload", false, "take changes of that file over while the server runs")
	o.Audit.AddFlags(groups.FlagSet("audit"))
	f = groups.FlagSet("features")
	f.BoolVar(&o.Profiling, "profiling", o.Profiling, "offer profiles of the server under /debug/pprof/")
	f.BoolVar(&o.ContentionProfiling, "contention-profiling", o.ContentionProfiling, "measure each wait for a lock or a channel (/debug/pprof/block), if profiling is enabled")
}

// shorten leaves out the lists of all plugins, which upstream puts into each flag's help.
func shorten(f *pflag.FlagSet) {
	f.Lookup("enable-admission-plugins").Usage = "admission plugins to enable in addition to the default ones, separated by commas; their order does not matter"
	f.Lookup("disable-admission-plugins").Usage = "default admission plugins to disable, separated by commas; their order does not matter"
}

// Validate reports everything that is wrong with the options, and with the files that they name. It starts nothing.
func (o *Options) Validate() error {
	errs := append(o.Audit.Validate(), o.Authentication.Validate()...)
	errs = append(errs, o.Authorization.Validate()...)
	errs = append(errs, o.Admission.Validate()...)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := o.Authentication.ToAuthenticationConfig()
	return errors.Join(err, o.auditFiles(), o.admissionFiles(), o.Encryption.validate(),
		exists("--token-auth-file", o.Authentication.TokenFile.TokenFile),
		exists("--authentication-token-webhook-config-file", o.Authentication.WebHook.ConfigFile),
		exists("--authorization-webhook-config-file", o.Authorization.WebhookConfigFile),
		exists("--authorization-policy-file", o.Authorization.PolicyFile))
}

// exists checks a file that is read when the server is made.
func exists(flag, path string) error {
	if path == "" {
		return nil
	}
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	return nil
}

func (o *Options) auditFiles() error {
	a := o.Audit
	if a.PolicyFile == "" {
		if a.LogOptions.Path != "" || a.WebhookOptions.ConfigFile != "" {
			return errors.New("--audit-log-path and --audit-webhook-config-file record nothing without a policy: give --audit-policy-file, too")
		}
		return nil
	}
	if _, err := policy.LoadPolicyFromFile(a.PolicyFile); err != nil {
		return fmt.Errorf("--audit-policy-file: %w", err)
	}
	return exists("--audit-webhook-config-file", a.WebhookOptions.ConfigFile)
}

// AdmissionPlugins are the plugins to run, in upstream's order.
func (o *Options) AdmissionPlugins() []string {
	a := o.Admission.GenericAdmission
	off := a.DefaultOffPlugins.Union(sets.New(a.DisablePlugins...)).Difference(sets.New(a.EnablePlugins...))
	var names []string
	for _, name := range a.RecommendedPluginOrder {
		if !off.Has(name) {
			names = append(names, name)
		}
	}
	return names
}

// AdmissionConfig gives each plugin its part of --admission-control-config-file.
func (o *Options) AdmissionConfig() (admission.ConfigProvider, error) {
	scheme, err := configScheme()
	if err != nil {
		return nil, err
	}
	return admission.ReadAdmissionConfiguration(o.AdmissionPlugins(), o.Admission.GenericAdmission.ConfigFile, scheme)
}

func (o *Options) admissionFiles() error {
	if _, err := o.AdmissionConfig(); err != nil {
		return fmt.Errorf("--admission-control-config-file: %w", err)
	}
	return nil
}

// configScheme knows upstream's configuration files.
func configScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	if err := apiserver.AddToScheme(scheme); err != nil {
		return nil, err
	}
	return scheme, apiserverv1.AddToScheme(scheme)
}

func (e Encryption) validate() error {
	if e.File == "" {
		if e.Reload {
			return errors.New("--encryption-provider-config-automatic-reload reloads the file of --encryption-provider-config: give that, too")
		}
		return nil
	}
	data, err := os.ReadFile(e.File)
	if err == nil {
		_, err = ParseEncryption(data, e.Reload)
	}
	if err != nil {
		return fmt.Errorf("--encryption-provider-config: %w", err)
	}
	return nil
}

// ParseEncryption reads and checks a file in upstream's EncryptionConfiguration format.
func ParseEncryption(data []byte, reload bool) (*apiserver.EncryptionConfiguration, error) {
	scheme, err := configScheme()
	if err != nil {
		return nil, err
	}
	obj, _, err := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDecoder().Decode(data, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("this is not an EncryptionConfiguration: %w", err)
	}
	config, ok := obj.(*apiserver.EncryptionConfiguration)
	if !ok {
		return nil, fmt.Errorf("this is a %T, not an EncryptionConfiguration", obj)
	}
	return config, validation.ValidateEncryptionConfiguration(config, reload).ToAggregate()
}
